"""Training: schedule, loss, step, loop, metrics, and compilation for hardware that is not here."""
