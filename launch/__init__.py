"""One absl app for each job, and the shell files that start them on clusters."""
