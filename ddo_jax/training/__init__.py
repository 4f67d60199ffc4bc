"""The loop: step, state, loop, round, run, read in that order."""
