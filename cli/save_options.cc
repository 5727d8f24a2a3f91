#include <cstdio>

#include "cli/commands.h"

namespace relatent {

void add_save_options(CLI::App& command, SaveOptions& save) {
  command.add_flag("--resume", save.resume,
                   "Go on with what an unfinished run of the same command left; start when there is nothing");
  command
      .add_option("--save-every", save.every,
                  "Seconds of work that an interruption may cost; 0 = save after every layer")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
}

std::function<void()> say_taken_up(bool quiet) {
  if (quiet) {
    return {};
  }
  return [] { std::fputs("continuing an unfinished run\n", stderr); };
}

}  // namespace relatent
