"""Kernels of cosmos-fast: the eager oracle, and the launchers of native code. Imports torch (and triton) only."""
