"""Models for other programs: files in their formats, written whole or not at all."""
