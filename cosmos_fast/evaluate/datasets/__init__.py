"""Published evaluation sets, read from the folders that their publishers' archives unpack to."""
