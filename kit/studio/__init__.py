"""A drawn world of talking characters in which everything that is seen and heard is known."""
