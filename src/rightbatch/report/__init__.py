"""Reports of plans and studies: data for each figure, thin renderers, one self-contained page."""
