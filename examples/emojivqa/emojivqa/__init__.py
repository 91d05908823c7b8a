"""EmojiVQA: visual question answering on small scenes of emoji."""
