"""What each figure shows, as data: records in, a small table and its finding in words out."""
