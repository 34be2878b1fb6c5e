"""What the tests of memory instructions share."""
