"""get_dispatch_layout: what a rank is going to send. Not collective."""
