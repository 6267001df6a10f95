#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "fetch/near/holders.hpp"
#include "tests/fuzz/fuzz.hpp"
#include "tests/fuzz/support/filling.hpp"

namespace vmigrate::fuzz {

/// What a near holder has been asked for, and what must come of each of its answers.
class NearModel {
 public:
  /// Pages that are claimed here, to be read from the holder.
  struct Claim {
    uint32_t region_index = 0;
    PageRun run;
    /// The holder has said that it has them, or they may be asked for without.
    bool may_read = false;
    bool is_looked_for = false;  ///< their states are being read
    bool is_absent = false;
    uint64_t posted_bytes = 0;
    uint32_t in_flight = 0;
    uint64_t tag = 0;
  };
  /// States that are being read, or have been.
  struct Look {
    uint32_t region_index = 0;
    PageRun run;
    transport::Operation operation;
  };
  /// What one poll must give, in this order.
  struct Outcome {
    std::vector<Claim> here, absent;
    std::vector<Look> looks;  ///< that have been answered with possible states
    std::optional<ErrorCode> failure;
  };

  /// `states` is what looks are read into; it must outlive the connection. `absent_fails`: a page that the
  /// holder has promised and does not have is the end of it.
  NearModel(Filling& filling, std::span<std::byte> states, bool absent_fails);
  /// A connection that the code under test takes over.
  pager::Link link();
  ScriptedEndpoint::Control& control() { return control_; }
  const ScriptedEndpoint::Control& control() const { return control_; }

  const std::vector<Claim>& claims() const { return claims_; }
  const std::vector<Look>& looks() const { return looks_; }
  uint64_t length_bytes(const Claim& claim) const;
  uint64_t claimed_bytes() const;
  bool is_waiting() const { return !claims_.empty() || !looks_.empty(); }
  /// The pages must have been absent in the model, and be claimed now.
  void claim(uint32_t region_index, PageRun run, bool may_read);
  /// A page is not the holder's any more: the caller has made it this.
  void set_state(uint32_t region_index, PageRun run, wire::PageState state);
  wire::PageState state(uint32_t region_index, uint64_t page) const;
  std::span<const std::byte> states(uint32_t region_index) const { return states_[region_index]; }
  /// No page is in another state than the model's.
  void check_states();

  /// Looks at the READs that were posted. Each is of pages that are claimed and may be read, each byte of
  /// them once, or of states. Returns the looks among them.
  std::vector<Look> take_posted();
  /// READs that have not been answered.
  std::vector<transport::Operation>& unanswered() { return unanswered_; }
  std::optional<Look> look_of(uint64_t tag) const;
  /// An answer whatever was asked, if there is nothing else to answer.
  uint64_t any_tag() const { return tags_.empty() ? 5 : tags_.back(); }
  /// Judges what the next poll must make of the completions that are there. Claims that it ends are not in
  /// claims() any more.
  Outcome judge(std::span<const transport::Completion> completions);
  /// Takes a claim away that the code under test has given up.
  void give_up(uint32_t region_index, PageRun run);

 private:
  Look take_look(const transport::Operation& operation);
  void take_read(const transport::Operation& operation);
  void judge_look(size_t index, transport::OpResult result, Outcome& outcome);
  void judge_read(size_t index, transport::OpResult result, Outcome& outcome);
  void use_tag(uint64_t tag);

  Filling& filling_;
  const std::span<std::byte> buffer_;
  const bool absent_fails_;
  ScriptedEndpoint::Control control_;
  std::vector<std::vector<std::byte>> states_;
  std::vector<Claim> claims_;
  std::vector<Look> looks_;
  std::vector<transport::Operation> unanswered_;
  std::vector<uint64_t> tags_;
};

}  // namespace vmigrate::fuzz
