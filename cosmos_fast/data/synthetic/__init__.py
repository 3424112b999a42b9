"""Synthetic scenes with captions and masks.

scene (what there is) -> render (pixels) and captions (language) -> writer (shards).
"""
