"""Absolute-Zero self-play: one model proposes puzzles and solves them."""
