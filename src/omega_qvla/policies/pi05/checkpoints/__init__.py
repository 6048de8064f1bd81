"""pi0.5 as openpi and LeRobot save it."""
