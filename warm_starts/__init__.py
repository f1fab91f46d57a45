"""Supervised fine-tuning: demonstrations, training, and what the policy can do afterwards."""
