#include "cli/commands.h"

namespace relatent {

void add_context_option(CLI::App& command, std::optional<Index>& context) {
  command
      .add_option("--context", context,
                  "Tokens of the sequences that the source is for, where its rotary frequencies depend on it "
                  "(longrope with two lists)")
      ->check(CLI::PositiveNumber);
}

}  // namespace relatent
