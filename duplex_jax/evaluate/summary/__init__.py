"""One page of what was measured of several models: read, put into tables, written as HTML and as Markdown."""
