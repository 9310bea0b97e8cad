"""Training data: timelines and chats encoded once, packed into rows, read back in a global order by every process."""
