"""Training: configuration, schedule, loss, step, loop, metrics, and compilation for absent hardware."""
