"""The HTML report: runs (read), findings, plots, examples (make), page (render, write); build puts them together."""
