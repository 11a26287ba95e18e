"""Objects under keys in a bucket, on a web server or in a folder: one interface, one retry policy, one error type."""

from .retry import RetryPolicy
from .store import RemoteStore
from .urls import is_remote, open_store, split_url

__all__ = ["RemoteStore", "RetryPolicy", "is_remote", "open_store", "split_url"]
