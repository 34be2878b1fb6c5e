"""Device code, imported when an operation first runs; nothing else imports Triton."""
