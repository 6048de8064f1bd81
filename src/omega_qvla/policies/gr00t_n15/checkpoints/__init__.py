"""GR00T N1.5 as Isaac-GR00T and LeRobot save it."""
