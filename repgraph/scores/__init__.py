"""One number per filter, high = keep: published criteria, one in each file."""
