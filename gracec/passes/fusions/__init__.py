"""Rules of fuse-decoder, one a file."""
