"""What a choice of batch and learning rate costs against the best of an exhaustive grid."""
