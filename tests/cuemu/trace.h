// Where in its code a thread stands, as offsets into this library; Python turns them into files and lines.
#pragma once

#include <dlfcn.h>

#include <cstdio>
#include <string>

#include "cuemu/runtime.h"
#include "fiber.h"

namespace cuemu {

inline std::string to_hex(uintptr_t value) {
  char text[24];
  snprintf(text, sizeof text, "%lx", static_cast<unsigned long>(value));
  return text;
}

inline std::string to_text(uint3 p) {
  return "(" + std::to_string(p.x) + "," + std::to_string(p.y) + "," + std::to_string(p.z) + ")";
}

// "[1a2b 1c3d]": the frames of this library, innermost first, found by walking the frame pointers on `context`'s stack.
inline std::string trace(Place place, const Context& context) {
  constexpr int kMaxFrames = 24;
  Dl_info own, found;
  dladdr(reinterpret_cast<void*>(&to_hex), &own);
  std::string text = "[";
  const uintptr_t low = reinterpret_cast<uintptr_t>(context.stack), high = low + context.stack_bytes - 64;
  for (int i = 0; i < kMaxFrames; ++i) {
    if (dladdr(reinterpret_cast<void*>(place.pc), &found) && found.dli_fbase == own.dli_fbase)
      text += (text.size() > 1 ? " " : "") + to_hex(place.pc - reinterpret_cast<uintptr_t>(own.dli_fbase));
    if (place.frame < low || place.frame > high - 16 || place.frame % sizeof(void*)) break;
    const uintptr_t* frame = reinterpret_cast<const uintptr_t*>(place.frame);
    if (frame[0] <= place.frame) break;
    place = {frame[1] - 1, frame[0]};
  }
  return text + "]";
}

}  // namespace cuemu
