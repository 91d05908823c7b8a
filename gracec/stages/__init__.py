"""The stages of a compilation, one file each: a value goes in, a new one comes out."""
