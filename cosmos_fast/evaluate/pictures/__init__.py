"""Pictures of what a model says.

sources: what is looked at. attention, retrieval, segmentation (with choices): what is shown. drawing: sheets as PNG.
album: all files of a folder.
"""
