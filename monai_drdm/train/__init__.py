"""Training recovery networks on one's own scans."""
