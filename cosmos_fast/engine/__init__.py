"""Training: one loop, and one file for each thing it needs.

Reading order: trainer (the loop) -> gradients, optimizer, schedules, precision, phases (one step) -> hooks, progress
(what happens after it) -> run_folder, checkpoint, state, rng (where a run starts and what is kept) -> metrics and its
sinks. estimate works out a run's needs beforehand.
"""
