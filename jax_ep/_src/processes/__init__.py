"""The processes of a group: how they meet, exchange messages, wait for one another, and end."""
