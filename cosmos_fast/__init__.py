"""cosmos-fast: a fast, memory-lean trainer for COSMOS vision-language models."""
