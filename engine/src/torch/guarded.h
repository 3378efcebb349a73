// Calls from Rust: C++ exceptions become messages that the caller frees with op_free.
#pragma once

#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>

inline char *message(const char *what) {
  char *copy = static_cast<char *>(std::malloc(std::strlen(what) + 1));
  if (copy != nullptr) std::strcpy(copy, what);
  return copy;
}

template <typename F> char *guarded(F body) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error &error) {
    return message(error.what_without_backtrace());
  } catch (const std::exception &error) {
    return message(error.what());
  } catch (...) {
    return message("an unknown C++ exception");
  }
}
