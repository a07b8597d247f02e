"""Many runs that answer one question: see command.py."""
