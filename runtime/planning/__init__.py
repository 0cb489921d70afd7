"""What an answer will take, by arithmetic before anything is loaded: bytes by part, and what would fit."""
