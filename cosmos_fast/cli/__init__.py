"""Commands: parse, build, run."""
