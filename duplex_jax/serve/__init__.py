"""The real-time server: many live sessions behind one engine, on a slice clock, over four protocols."""
