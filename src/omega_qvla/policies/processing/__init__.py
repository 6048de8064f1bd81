"""Between the robot's units and a network's: images, numbers, text."""
