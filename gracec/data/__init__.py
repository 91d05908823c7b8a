"""Data: records, pictures, questions and prompts, for training and evaluation alike."""
