#include "tests/fuzz/support/near_model.hpp"

#include <algorithm>

namespace vmigrate::fuzz {
namespace {

using transport::OpResult;
using wire::PageState;

constexpr uint64_t kRamKey = 100, kStatesKey = 200;

bool is_same(PageRun left, PageRun right) {
  return left.first == right.first && left.count == right.count;
}

}  // namespace

NearModel::NearModel(Filling& filling, std::span<std::byte> states, bool absent_fails)
    : filling_(filling), buffer_(states), absent_fails_(absent_fails) {
  filling.reset();
  for (uint32_t region = 0; region < filling.region_count(); ++region)
    states_.emplace_back(filling.page_count(region));
}

pager::Link NearModel::link() {
  pager::Link link;
  link.endpoint = std::make_unique<ScriptedEndpoint>(control_);
  VMG_CHECK(pager::register_regions(link, filling_.fill()).ok());
  link.map_buffer =
      link.endpoint->register_local({.base = buffer_.data(), .length_bytes = buffer_.size()}).value();
  for (uint32_t region = 0; region < filling_.region_count(); ++region) {
    const uint64_t length_bytes = filling_.fill().region(region).file->length_bytes();
    link.keys.push_back(
        {{0, kRamKey + region, length_bytes}, {}, {0, kStatesKey + region, filling_.page_count(region)}});
  }
  return link;
}

uint64_t NearModel::length_bytes(const Claim& claim) const {
  return claim.run.count * filling_.fill().regions()[claim.region_index].page_bytes();
}

uint64_t NearModel::claimed_bytes() const {
  uint64_t bytes = 0;
  for (const Claim& claim : claims_) bytes += length_bytes(claim);
  return bytes;
}

void NearModel::claim(uint32_t region_index, PageRun run, bool may_read) {
  const std::vector<std::byte> absent(run.count);
  VMG_CHECK(same(states(region_index).subspan(raw(run.first), run.count), absent));
  set_state(region_index, run, PageState::kClaimed);
  claims_.push_back({.region_index = region_index, .run = run, .may_read = may_read});
}

void NearModel::set_state(uint32_t region_index, PageRun run, PageState state) {
  std::fill_n(states_[region_index].begin() + static_cast<std::ptrdiff_t>(raw(run.first)), run.count,
              static_cast<std::byte>(state));
}

PageState NearModel::state(uint32_t region_index, uint64_t page) const {
  return static_cast<PageState>(states_[region_index][page]);
}

void NearModel::check_states() {
  for (uint32_t region = 0; region < states_.size(); ++region)
    VMG_CHECK(same(filling_.states(region), states_[region]));
}

void NearModel::use_tag(uint64_t tag) {
  VMG_CHECK(std::find(tags_.begin(), tags_.end(), tag) == tags_.end());
  tags_.push_back(tag);
}

std::vector<NearModel::Look> NearModel::take_posted() {
  std::vector<Look> looks;
  for (const transport::Operation& operation : control_.posted) {
    if (static_cast<size_t>(operation.local) == states_.size())
      looks.push_back(take_look(operation));
    else
      take_read(operation);
    unanswered_.push_back(operation);
  }
  control_.posted.clear();
  return looks;
}

NearModel::Look NearModel::take_look(const transport::Operation& operation) {
  use_tag(operation.tag);
  VMG_CHECK(operation.remote.key >= kStatesKey && operation.remote.key < kStatesKey + states_.size());
  for (const Look& other : looks_) {
    const transport::Operation& there = other.operation;
    VMG_CHECK(operation.local_offset_bytes + operation.length_bytes <= there.local_offset_bytes ||
              operation.local_offset_bytes >= there.local_offset_bytes + there.length_bytes);
  }
  const Look look{static_cast<uint32_t>(operation.remote.key - kStatesKey),
                  {PageIndex{operation.remote_offset_bytes}, operation.length_bytes},
                  operation};
  for (Claim& claim : claims_) {
    if (claim.may_read || claim.region_index != look.region_index || !is_same(claim.run, look.run)) continue;
    VMG_CHECK(!claim.is_looked_for);
    claim.is_looked_for = true;
  }
  looks_.push_back(look);
  return look;
}

void NearModel::take_read(const transport::Operation& operation) {
  const auto region_index = static_cast<uint32_t>(operation.local);
  VMG_CHECK(operation.remote.key == kRamKey + region_index);
  VMG_CHECK(operation.remote_offset_bytes == operation.local_offset_bytes);
  const uint64_t page_bytes = filling_.fill().region(region_index).page_bytes();
  for (Claim& claim : claims_) {
    const uint64_t next = raw(claim.run.first) * page_bytes + claim.posted_bytes;
    if (claim.region_index != region_index || next != operation.local_offset_bytes) continue;
    if (claim.posted_bytes == length_bytes(claim)) continue;
    VMG_CHECK(claim.may_read && !claim.is_absent);
    VMG_CHECK(operation.length_bytes <= length_bytes(claim) - claim.posted_bytes);
    if (claim.posted_bytes == 0)
      use_tag(claim.tag = operation.tag);
    else
      VMG_CHECK(claim.tag == operation.tag);
    claim.posted_bytes += operation.length_bytes;
    ++claim.in_flight;
    return;
  }
  VMG_CHECK(!"a READ of pages that are not claimed");
}

std::optional<NearModel::Look> NearModel::look_of(uint64_t tag) const {
  for (const Look& look : looks_)
    if (look.operation.tag == tag) return look;
  return std::nullopt;
}

NearModel::Outcome NearModel::judge(std::span<const transport::Completion> completions) {
  Outcome outcome;
  for (const auto& completion : completions) {
    if (outcome.failure) return outcome;
    const auto look = std::find_if(looks_.begin(), looks_.end(),
                                   [&](const Look& each) { return each.operation.tag == completion.tag; });
    const auto claim = std::find_if(claims_.begin(), claims_.end(), [&](const Claim& each) {
      return each.in_flight != 0 && each.tag == completion.tag;
    });
    if (look != looks_.end())
      judge_look(static_cast<size_t>(look - looks_.begin()), completion.result, outcome);
    else if (claim != claims_.end())
      judge_read(static_cast<size_t>(claim - claims_.begin()), completion.result, outcome);
    else
      outcome.failure = ErrorCode::kProtocol;
  }
  if (completions.empty() && control_.is_cut) outcome.failure = ErrorCode::kDisconnected;
  return outcome;
}

void NearModel::judge_look(size_t index, OpResult result, Outcome& outcome) {
  if (result != OpResult::kOk) {
    outcome.failure = result == OpResult::kDisconnected ? ErrorCode::kDisconnected : ErrorCode::kProtocol;
    return;
  }
  const Look look = looks_[index];
  const auto states = buffer_.subspan(look.operation.local_offset_bytes, look.run.count);
  if (std::any_of(states.begin(), states.end(), [](std::byte state) { return state > std::byte{3}; })) {
    outcome.failure = ErrorCode::kProtocol;
    return;
  }
  looks_.erase(looks_.begin() + static_cast<std::ptrdiff_t>(index));
  outcome.looks.push_back(look);
  for (size_t i = 0; i < claims_.size(); ++i) {
    Claim& claim = claims_[i];
    if (!claim.is_looked_for || claim.region_index != look.region_index || !is_same(claim.run, look.run))
      continue;
    claim.is_looked_for = false;
    const auto state = static_cast<PageState>(states[0]);
    claim.may_read = state == PageState::kPresent || state == PageState::kZero;
    if (claim.may_read) return;
    outcome.absent.push_back(claim);
    claims_.erase(claims_.begin() + static_cast<std::ptrdiff_t>(i));
    return;
  }
}

void NearModel::judge_read(size_t index, OpResult result, Outcome& outcome) {
  Claim& claim = claims_[index];
  switch (result) {
    case OpResult::kOk:
    case OpResult::kAbsent:
      break;
    case OpResult::kDisconnected:
      outcome.failure = ErrorCode::kDisconnected;
      return;
    case OpResult::kNoSpace:
      outcome.failure = ErrorCode::kNoSpace;
      return;
    case OpResult::kIoError:
      outcome.failure = ErrorCode::kRegionChanged;
      return;
    default:
      outcome.failure = ErrorCode::kProtocol;
      return;
  }
  claim.is_absent |= result == OpResult::kAbsent;
  // What was posted is waited for, also if the rest is not asked for any more.
  if (--claim.in_flight != 0 || (!claim.is_absent && claim.posted_bytes != length_bytes(claim))) return;
  if (claim.is_absent && absent_fails_) {
    outcome.failure = ErrorCode::kProtocol;
    return;
  }
  (claim.is_absent ? outcome.absent : outcome.here).push_back(claim);
  claims_.erase(claims_.begin() + static_cast<std::ptrdiff_t>(index));
}

void NearModel::give_up(uint32_t region_index, PageRun run) {
  VMG_CHECK(control_.is_gone);
  const auto found = std::find_if(claims_.begin(), claims_.end(), [&](const Claim& claim) {
    return claim.region_index == region_index && is_same(claim.run, run);
  });
  VMG_CHECK(found != claims_.end());
  claims_.erase(found);
}

}  // namespace vmigrate::fuzz
