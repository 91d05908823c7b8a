"""What gracec can be given by another package, one file each."""
