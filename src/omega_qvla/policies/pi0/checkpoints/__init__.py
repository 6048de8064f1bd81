"""pi0 as openpi and LeRobot save it."""
