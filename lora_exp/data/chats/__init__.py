"""Conversations: chat templates, the tokens of each turn, and checks of what a template leaves out."""
