"""From tar shards to batches: index, order, augmentation numbers, captions, crops and the loader over them.

Reading order: storage -> tar -> sources -> index -> order -> rng -> augment / captions -> images / records ->
tokenizer -> recolor -> sample -> loader; where DALI cuts, also image_check -> encoded -> dali_pipeline -> dali_loader.
A sample is a pure function of (seed, position): position is all that a resume needs.
"""
