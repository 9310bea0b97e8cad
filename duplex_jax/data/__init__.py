"""Training data: timelines and chats, encoded once, packed into rows, and read in one global order by all processes."""
