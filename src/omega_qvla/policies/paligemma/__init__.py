"""What pi0 and pi0.5 share: PaliGemma, read once per observation, and an expert beside it."""
