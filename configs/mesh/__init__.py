"""Named meshes: the hardware, and the number of devices along each axis."""
