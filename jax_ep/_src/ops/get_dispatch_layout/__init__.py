"""get_dispatch_layout: counts the tokens that a rank is going to send. Not collective."""
