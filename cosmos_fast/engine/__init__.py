"""Training: one loop, and one file for each thing it needs.

Reading order: trainer (the loop and one step) -> optimizer, schedules, precision (what a step does) -> hooks, progress
(what happens after it) -> run_folder, checkpoint, state, rng (where a run starts and what is kept) -> metrics and its
sinks. estimate works out a run's needs beforehand.
"""
