"""One absl app per job, and the scripts that start them on clusters."""
