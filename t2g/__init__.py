"""Text2Grad in plain PyTorch: critique -> quoted spans -> token rewards -> PPO.

Read in this order: feedback, align, ppo, then ../train_ppo.py. Nothing here runs on import.
"""
